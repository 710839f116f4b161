#!/usr/bin/env bash
# Waits until the provider gives notice that this machine will be taken away, and has Ray drain its node then:
#   launch/spot.sh ec2|gce [PID]    in the background on a spot machine; PID: its raylet's, where it has several
# The jobs on the node save and leave it.
set -euo pipefail

provider=${1:-}
metadata=${METADATA_ADDRESS:-http://169.254.169.254} # the same at both providers
case $provider in
ec2) seconds=110 ;; # of the two minutes' notice
gce) seconds=25 ;;  # of 30 s
*)
    echo "usage: launch/spot.sh ec2|gce [PID]" >&2
    exit 2
    ;;
esac
pid=${2:-}

noticed() {
    local ask=(curl --silent --fail --max-time 5) token
    if [ "$provider" = ec2 ]; then # the page is not there before
        token=$("${ask[@]}" -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") &&
            "${ask[@]}" -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action" >/dev/null
    else
        [ "$("${ask[@]}" -H "Metadata-Flavor: Google" "$metadata/computeMetadata/v1/instance/preempted")" = TRUE ]
    fi
}

until noticed; do sleep 2; done
echo "the machine will be taken away: Ray drains its node" >&2
words=$(tr "\0" "\n" <"/proc/${pid:-$(pgrep -o -x raylet)}/cmdline")
value() { sed -n "s/^--$1=//p" <<<"$words"; }
until ray drain-node --address="$(value 'gcs[-_]address')" --node-id="$(value 'node[-_]id')" \
    --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message="spot notice" --deadline-remaining-seconds="$seconds"; do
    sleep 1
done
