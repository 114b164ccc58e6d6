"""What requests hold. A field that is not here is refused by name, unless it is null."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

Text = StrictStr
Id = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Count = Annotated[StrictInt, Field(ge=1, lt=2**31)]
IdText = Annotated[StrictStr, Field(pattern="^[0-9]{1,10}$")]  # keys of JSON objects are text
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
StopText = Annotated[StrictStr, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        """Null is as good as absent, as in OpenAI's server."""
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class StreamOptions(Body):
    include_usage: StrictBool = False


class Sampling(Body):
    """What /v1/completions and /v1/chat/completions share. The second half is not OpenAI's."""

    model: Text | None = None
    n: Annotated[StrictInt, Field(ge=1, le=8)] = 1
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    stop: StopText | Annotated[list[StopText], Field(max_length=8)] = []
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[IdText, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None

    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] = 1.0  # beyond, logits overflow
    ignore_eos: StrictBool = False
    min_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] = 0
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] = []
    experts_per_token: Count | None = None
    return_token_ids: StrictBool = False
    return_routed_experts: StrictBool = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self) -> dict[str, object]:
        """Arguments of ``_C.SamplingParams``, without max_tokens and those of log probabilities."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
            "min_tokens": self.min_tokens,
            "stop_token_ids": self.stop_token_ids,
        }


class CompletionRequest(Sampling):
    prompt: Text | list[Text] | list[Id] | list[list[Id]]
    max_tokens: Count = 16
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool = False
    best_of: Literal[1] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    name: Text
    arguments: Text


class ToolCall(Body):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] = ""
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are for messages of the assistant only")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id is for messages of a tool, and all of them have it")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Function(Body):
    name: Annotated[Text, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool = False


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: Text


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    name: Text
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: StrictBool = True


class ResponseFormat(Body):
    """Of a chat's answer. A schema is kept to whether it is strict or not."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is for type json_schema, which needs it")
        return self

    def schema_of_text(self) -> dict[str, Any] | None:
        """None: any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: StrictBool = True
    response_format: ResponseFormat | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] = 0


class TokenizeRequest(Body):
    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: list[Id]
