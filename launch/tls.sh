#!/usr/bin/env bash
# Makes a certificate authority and one node's certificate with which Ray encrypts and authenticates its own connections:
#   launch/tls.sh DIR ADDRESS...    ADDRESS: every name and IP by which the others reach this node; 127.0.0.1 is added
# DIR/ca.key signs and stays with you; a node needs ca.crt, node.crt and node.key. Run it again for the next node with
# another --node: launch/tls.sh DIR --node NAME ADDRESS... It prints the environment for that node's shells.
set -euo pipefail

usage() {
    echo "usage: launch/tls.sh DIR [--node NAME] ADDRESS..." >&2
    exit 2
}
[ $# -ge 2 ] || usage
dir=$1 node=node
shift
if [ "$1" = --node ]; then
    [ $# -ge 3 ] || usage
    node=$2
    shift 2
fi
umask 077
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)

if [ ! -s "$dir/ca.key" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj "/CN=ali_dist" \
        -keyout "$dir/ca.key" -out "$dir/ca.crt" 2>/dev/null
fi
names=DNS:localhost,IP:127.0.0.1
for address in "$@"; do
    if [[ $address =~ ^[0-9.]+$ || $address == *:* ]]; then
        names+=",IP:$address"
    else
        names+=",DNS:$address"
    fi
done
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$1" -addext "subjectAltName=$names" \
    -keyout "$dir/$node.key" -out "$dir/$node.csr" 2>/dev/null
openssl x509 -req -in "$dir/$node.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -CAcreateserial -days 365 \
    -copy_extensions copy -out "$dir/$node.crt" 2>/dev/null
rm "$dir/$node.csr"
printf 'export %s\n' RAY_USE_TLS=1 "RAY_TLS_CA_CERT=$(printf %q "$dir/ca.crt")" \
    "RAY_TLS_SERVER_CERT=$(printf %q "$dir/$node.crt")" "RAY_TLS_SERVER_KEY=$(printf %q "$dir/$node.key")"
