"""Tries grammars in a process of its own, which grammar.py starts, limits and ends: some schemas take for ever.

One JSON object a line. First {"path": sys.path}; then {"grammar"}, each answered by {"error"}, empty when it is good.
"""

import json
import signal
import sys

MEMORY = 512 << 20  # beyond what the process has before it tries one
ORPHAN_SECONDS = 10  # then it ends itself: whoever started it would have done so long before, and is gone


def main() -> None:
    sys.path[:] = json.loads(sys.stdin.readline())["path"]
    import resource

    from llguidance import LLMatcher, LLParserLimits

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    limits = LLParserLimits(verbose_errors=False)
    print("{}", flush=True)
    for line in sys.stdin:
        signal.alarm(ORPHAN_SECONDS)
        error = LLMatcher.validate_grammar(json.loads(line)["grammar"], limits=limits)
        signal.alarm(0)
        print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    main()
