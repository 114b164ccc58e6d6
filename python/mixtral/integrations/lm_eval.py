"""Mixtral as a model of EleutherAI's lm-evaluation-harness (``pip install lm-eval``).

    import lm_eval, mixtral
    from mixtral.integrations import lm_eval as _          # registers the model "mixtral"
    lm_eval.simple_evaluate("mixtral", model_args={"pretrained": folder}, tasks=["lambada_openai"])

Scores and texts are those of the harness's ``hf`` model on the same checkpoint. Requests of any lengths share forward
passes, so there is no batch size to choose, and none that changes a result.
"""

import math
from collections.abc import Sequence
from os import PathLike

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from .. import _C
from ..chat_template import render
from ..model import Mixtral
from ..tokenizer import Tokenizer

Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("mixtral")
class MixtralLM(TemplateLM):
    """``loglikelihood``, ``loglikelihood_rolling`` and ``generate_until`` by ``mixtral.Mixtral``."""

    def __init__(
        self,
        pretrained: str | PathLike[str] | Mixtral,
        device: str = "cpu",
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: object,
    ) -> None:
        """
        Args:
            pretrained: a loaded model, or what ``Mixtral.from_pretrained`` takes.
            device, dtype, options: of ``Mixtral.from_pretrained``, such as ``lora`` and ``experts_per_token``.
            max_length: the longest sequence; None: what the model was made for.
            max_gen_toks: new tokens of a generation whose task does not say how many.
            add_bos_token: put BOS in front of a text that does not begin with it, as the ``hf`` model does with the
                tokenizers of Mistral.
            batch_size, max_batch_size: the harness gives them to every model; not used.

        Raises:
            ValueError: a model without a tokenizer, or a ``max_length`` beyond its context.
            LoadError, MemoryError: as ``Mixtral.from_pretrained``.
        """
        super().__init__()
        loaded = isinstance(pretrained, Mixtral)
        self.model = pretrained if loaded else Mixtral.from_pretrained(pretrained, device, dtype, **options)
        if self.model.tokenizer is None:
            raise ValueError("lm_eval: model expected a tokenizer, got none")
        context = self.model.config.max_position
        if max_length is not None and not 2 <= max_length <= context:
            raise ValueError(f"lm_eval: max_length must be in [2, {context}], got {max_length}")
        self.max_length = max_length or context
        self.max_gen_toks = max_gen_toks
        self._add_bos = add_bos_token

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells cached prompts of different tokenizers apart."""
        return f"mixtral-{self._tokenizer.version}-{self._tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Control tokens written in the text count as such, as in transformers."""
        begins = string.startswith(self._tokenizer.piece(self.prefix_token_id))
        bos = self._add_bos and not begins if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, add_bos=bos, parse_special=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        found = _C.find_chat_template(self._tokenizer._folder)
        return found[0] if chat_template and found else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the model's own template.

        Raises:
            ValueError: the model has none; what the template refuses.
        """
        found = _C.find_chat_template(self._tokenizer._folder)
        if found is None:
            raise ValueError("lm_eval: the model has no chat template; evaluate it without apply_chat_template")
        messages = [dict(message) for message in chat_history]
        messages[-1]["prefix"] = not add_generation_prompt
        return render(*found, messages, _C.special_token_texts(self._tokenizer._folder))

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"lm_eval: a continuation must have at most {self.max_length} tokens, got {len(continuation)}"
                )
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
            contexts.append(context[-room:])
            continuations.append(continuation)
        with tqdm(desc="Scoring tokens", unit="token", disable=disable_tqdm) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self.model._check_process()
            scores = _C.score_continuations(self.model._model, contexts, continuations, _C.CHUNK_SIZE, progress)
        for request, score in zip(requests, scores, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in disjoint windows of ``max_length`` tokens that each see one token before them."""
        windows: list[Pair] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in found]
            windows += pairs
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        results = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests with the same settings run as one batch."""
        results: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for indices in groups.values():
                texts = self._generate([requests[i].args[0] for i in indices], requests[indices[0]].args[1])
                for index, text in zip(indices, texts, strict=True):
                    results[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(indices))
        return [results[index] for index in range(len(requests))]

    def _generate(self, contexts: list[str], gen_kwargs: dict[str, object]) -> list[str]:
        settings = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        stops, new_tokens = settings["until"], settings["max_gen_toks"]
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(f"lm_eval: max_gen_toks must be below {self.max_length}, got {new_tokens}")
        sampling = {name: settings[name] for name in ("top_p", "top_k", "min_p") if name in settings}
        generations = self.model.generate(
            [self.tok_encode(context)[-room:] for context in contexts],
            max_tokens=new_tokens,
            temperature=settings.get("temperature", 0.0),
            stop=[stop for stop in stops if stop],
            **sampling,
        )
        # As a text of its own, without the space in front that goes on from the prompt.
        texts = [self._tokenizer.decode(generation.token_ids) for generation in generations]
        return [postprocess_generated_text(text, stops, None) for text in texts]
