# What a host sets before it starts Ray; all workers inherit it. Sourced by local.yaml, aws.yaml and gcp.yaml.
export PATH="$HOME/vlae-pipeline/.venv/bin:$PATH"
export RAY_AUTH_MODE=token # the token is in ~/.ray/auth_token
# PyTorch would take the address of the host's own name, which on Debian and Ubuntu is a loopback address.
GLOO_SOCKET_IFNAME=$(ip -4 -oneline route show default | sed 's/.* dev \([^ ]*\).*/\1/; q')
export GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME="$GLOO_SOCKET_IFNAME"
# A host that is cut off is given up after 25 s, not after a minute.
export RAY_health_check_period_ms=3000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3
ulimit -n 65536 2>/dev/null || true
