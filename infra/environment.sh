# The environment that a host sets before it starts Ray; all workers inherit it.
# Sourced by local.yaml, aws.yaml and gcp.yaml.
export PATH="$HOME/vlae-pipeline/.venv/bin:$PATH"
export RAY_AUTH_MODE=token # the token is in ~/.ray/auth_token
if [ -e "$HOME/.ray/tls.key" ]; then # docs/cluster.md makes it
  export RAY_USE_TLS=1 RAY_TLS_SERVER_KEY="$HOME/.ray/tls.key"
  export RAY_TLS_SERVER_CERT="$HOME/.ray/tls.crt" RAY_TLS_CA_CERT="$HOME/.ray/tls.crt"
fi
# By default PyTorch uses the address of the host's name, which on Debian and Ubuntu is loopback.
GLOO_SOCKET_IFNAME=$(ip -4 -oneline route show default | sed 's/.* dev \([^ ]*\).*/\1/; q')
export GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME="$GLOO_SOCKET_IFNAME"
# Ray declares an unreachable host dead after 25 s instead of a minute.
export RAY_health_check_period_ms=3000 RAY_health_check_timeout_ms=5000
export RAY_health_check_failure_threshold=3
ulimit -n 65536 2>/dev/null || true
