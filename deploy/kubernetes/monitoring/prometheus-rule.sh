#!/bin/sh
# Writes the alert rules as a PrometheusRule, so that they stand in one file only:
#   deploy/kubernetes/monitoring/prometheus-rule.sh | kubectl apply -f -
set -eu
cat <<'MANIFEST'
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hybridkv-vllm
spec:
MANIFEST
sed 's/^/  /' "$(dirname "$0")/../../prometheus/alerts.yml"
