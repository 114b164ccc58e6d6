"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: with them evaluation harnesses need no tokenizer."""

from fastapi import APIRouter, Request

from .errors import ApiError
from .protocol import DetokenizeRequest, TokenizeRequest
from .served import served
from .strict_json import StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, object]:
    """The ids of a text or a chat. A text that is the name of one control token, such as "</s>", gives that token."""
    server = served(request)
    server.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt", "invalid_value")
    if body.messages is not None:
        ids = await server.chat_prompt(body.messages)
    elif not body.prompt:
        ids = [server.need_tokenizer("prompt").bos_id] if body.add_special_tokens else []
    else:
        tokenizer = server.need_tokenizer("prompt")
        control = tokenizer.encode(body.prompt, parse_special=True) if len(body.prompt) < 64 else []
        is_control = len(control) == 1 and tokenizer.is_control(control[0])
        ids = control if is_control else (await server.encode([body.prompt], body.add_special_tokens))[0]
    result: dict[str, object] = {"count": len(ids), "max_model_len": server.context, "tokens": ids}
    if body.return_token_strs:
        result["token_strs"] = [server.texts.text(token) for token in ids]
    return result


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    server = served(request)
    server.check_name(body.model)
    return {"prompt": server.need_tokenizer("tokens").decode(body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, object]:
    tokenizer = served(request).need_tokenizer("tokenizer_info")
    return {
        "tokenizer_class": "SentencePiece",
        "version": tokenizer.version,
        "vocab_size": tokenizer.vocab_size,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "model_max_length": served(request).context,
        "chat_template": tokenizer.chat_template,
    }
