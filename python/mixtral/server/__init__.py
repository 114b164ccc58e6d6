"""``mixtral serve``: an OpenAI-compatible server on the engine. Needs the packages of ``pip install 'mixtral[serve]'``.

protocol     what requests hold; what is not implemented is refused by name
bridge       from the engine's thread to the event loop
completions  /v1/completions
chat         /v1/chat/completions
tools        what a chat asks of its answer beyond text: tool calls, and a format
tool_calls   tool calls in an answer, by their token; call_reader reads their text
grammar      what an answer must match, and which tokens that leaves
streaming    server-sent events, and clients that go away
models       /v1/models, /version
tokens       /tokenize, /detokenize, /tokenizer_info
app          puts the routes together
limits       what a client can take: sizes, times, connections; the protocol class that keeps them
auth, body   the API key; bodies are JSON
lifecycle    phases, health routes, and one end for every request
run          the process: socket, signals, exit status, and the order of the middleware
logs         JSON lines with request ids
metrics      /metrics
command      the flags of ``mixtral serve``
"""
