# Sourced by setup.sh: says what is going on and how long it takes. The caller sets `stages`, how many there are.
stage_number=0
stage_log=$(mktemp)
trap 'rm -f "$stage_log"' EXIT

# stage TEXT COMMAND...: "[2/4] TEXT ... 42 s". The command's output is shown when it fails.
stage() {
  local text=$1 start=$SECONDS said=$SECONDS status=0 job counter
  shift
  stage_number=$((stage_number + 1))
  text="[$stage_number/$stages] $text ..."
  printf '%s ' "$text"
  "$@" <&0 >"$stage_log" 2>&1 &
  job=$!
  trap 'kill "$job" 2>/dev/null || true; echo; exit 130' INT TERM # bash lets what runs in the background ignore Ctrl-C
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.1
    counter=$(tail -n 1 "$stage_log" | grep -o '^\[[0-9]*/[0-9]*\]' || true) # of ninja
    if [[ -t 1 ]]; then
      printf '\r%s %d s %s' "$text" $((SECONDS - start)) "$counter"
    elif ((SECONDS - said >= 60)); then # a log: a sign of life a minute
      said=$SECONDS
      printf '%d s %s' $((SECONDS - start)) "${counter:+$counter }"
    fi
  done
  wait "$job" || status=$?
  trap - INT TERM
  [[ ! -t 1 ]] || printf '\r\033[K%s ' "$text"
  printf '%d s\n' $((SECONDS - start))
  if ((status)); then
    cat "$stage_log" >&2
    echo "failed: $*" >&2
    exit "$status"
  fi
}

# skip TEXT: there is nothing to do.
skip() {
  stage_number=$((stage_number + 1))
  printf '[%d/%d] %s\n' "$stage_number" "$stages" "$1"
}
