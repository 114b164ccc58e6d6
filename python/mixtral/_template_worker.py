"""Renders chat templates in a process of its own, which chat_template.py starts, limits and ends.

One JSON object a line. First {"path": sys.path}; then {"template", "variables"}, each answered by {"text"} or by
{"error", "message"}: "refused" where the template raises an exception, "syntax", "failed", or "limit".
"""

import json
import signal
import sys

MEMORY = 512 << 20  # beyond what the process has before it renders
OUTPUT = 16 << 20  # characters of one text
ORPHAN_SECONDS = 10  # then it ends itself: whoever started it would have done so long before, and is gone


def main() -> None:
    sys.path[:] = json.loads(sys.stdin.readline())["path"]
    render = make_renderer()
    limit_memory()
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(ORPHAN_SECONDS)
        answer = render(request["template"], request["variables"])
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


def limit_memory() -> None:
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def make_renderer():
    from datetime import datetime
    from functools import lru_cache

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Refused(Exception):
        pass

    class Generation(Extension):
        """{% generation %} marks answers in training data; here it only keeps its variables to itself."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    def raise_exception(message):
        raise Refused(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    compiled = lru_cache(maxsize=16)(environment.from_string)

    def render(template, variables):
        try:
            parts, size = [], 0
            for part in compiled(template).generate(**variables):
                parts.append(part)
                size += len(part)
                if size > OUTPUT:
                    return {"error": "limit", "message": f"renders more than {OUTPUT >> 20} MiB"}
            return {"text": "".join(parts)}
        except Refused as error:
            return {"error": "refused", "message": str(error)}
        except MemoryError:
            return {"error": "limit", "message": f"needs more than {MEMORY >> 20} MiB of memory"}
        except jinja2.TemplateSyntaxError as error:
            return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
        except Exception as error:  # whatever a template may do wrong
            return {"error": "failed", "message": f"{type(error).__name__}: {error}"}

    return render


if __name__ == "__main__":
    main()
