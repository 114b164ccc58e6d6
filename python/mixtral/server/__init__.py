"""``mixtral serve``: an OpenAI-compatible server on the engine. Needs the packages of ``pip install 'mixtral[serve]'``.

protocol     what requests hold; what is not implemented is refused by name
bridge       from the engine's thread to the event loop
completions  /v1/completions
chat         /v1/chat/completions
streaming    server-sent events, and clients that go away
models       /v1/models, /version
tokens       /tokenize, /detokenize, /tokenizer_info
app          puts the routes together
command      the flags of ``mixtral serve``
"""
