"""What a server is told when it starts; the flags of ``mixtral serve``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        api_key: what clients must send as "Authorization: Bearer KEY"; None: nothing.
        served_model_name: the model's name in requests and answers.
        chat_template: as of ``Tokenizer.apply_chat``; None: the model's own.
        trace: a file that gets the routing of all requests when the server ends; None: nothing is kept.
        replay: a trace whose experts are forced on the requests that begin as one of its sequences does; None: none.
        max_prompts: most prompts of one request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str = "mixtral"
    chat_template: str | None = None
    trace: str | None = None
    replay: str | None = None
    max_prompts: int = 256
