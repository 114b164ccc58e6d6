"""Chat templates as fine-tunes ship them, several ways of writing each format, and random conversations."""

import random

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = DEFAULT %}{% endif %}"
)

# Name of the format -> templates. The first of each is the format itself; the others change something of it.
TEMPLATES = {
    "chatml": [
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
        "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        # Tools, of which a plain chat has none.
        "{%- macro schema(tool) %}{{ tool | tojson }}{% endmacro %}\n"
        "{%- if tools %}\n{{- '<|im_start|>system\\n' }}\n{%- for tool in tools %}\n{{- schema(tool) }}\n"
        "{%- endfor %}\n"
        "{%- elif messages[0].role == 'system' %}\n{{- '<|im_start|>system\\n' + messages[0].content + "
        "'<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- set ns = namespace(last=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n{%- if message.role == 'user' and ns.last >= 0 %}\n"
        "{%- set ns.last = -1 %}\n{%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n{%- if message.role in ['user', 'assistant'] or not loop.first %}\n"
        "{{- '<|im_start|>' + message.role }}\n{{- '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        "{%- for message in messages %}\n    {%- if loop.first and message.role != 'system' %}\n"
        "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n"
        "    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\n",
    ],
    "zephyr": [
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
        "eos_token }}\n{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "{% for message in messages %}{{ '<|' ~ message.role ~ '|>\\n' ~ message.content.strip() ~ eos_token ~ '\\n' }}"
        "{% endfor %}{{ '<|assistant|>\\n' if add_generation_prompt }}",
    ],
    "llama-2": [
        SPLIT_SYSTEM.replace("DEFAULT", "false") + "{% for message in loop_messages %}" + ALTERNATE + "{% if "
        "loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
        "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
        SPLIT_SYSTEM.replace("DEFAULT", "'You are a helpful, honest assistant.'") + "{% for message in loop_messages %}"
        "{% set content = message['content'] | trim %}{% if loop.first %}{% set content = '<<SYS>>\n' ~ system_message "
        "~ '\n<</SYS>>\n\n' ~ content %}{% endif %}{{ bos_token + '[INST] ' + content + ' [/INST]' if message.role == "
        "'user' else ' ' + content + ' ' + eos_token }}{% endfor %}",
        "{%- for idx in range(0, messages|length) -%}\n{%- if messages[idx]['role'] == 'user' -%}\n"
        "{%- if idx > 1 -%}\n{{- bos_token + '[INST] ' + messages[idx]['content'] + ' [/INST]' -}}\n{%- else -%}\n"
        "{{- messages[idx]['content'] + ' [/INST]' -}}\n{%- endif -%}\n{% elif messages[idx]['role'] == 'system' %}\n"
        "{{- '[INST] <<SYS>>\\n' + messages[idx]['content'] + '\\n<</SYS>>\\n\\n' -}}\n"
        "{%- elif messages[idx]['role'] == 'assistant' -%}\n{{- ' '  + messages[idx]['content'] + ' ' + eos_token -}}\n"
        "{% endif %}\n{% endfor %}",
    ],
    "alpaca": [
        SPLIT_SYSTEM.replace(
            "DEFAULT",
            "'Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.'",
        )
        + "{{ bos_token + system_message + '\\n\\n' }}{% for message in loop_messages %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
        "{{ (messages|selectattr('role', 'equalto', 'system')|list|last).content|trim if (messages|selectattr('role', "
        "'equalto', 'system')|list) else '' }}\n{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "### Instruction:\n{{ message['content']|trim -}}\n{% if not loop.last %}\n\n\n{% endif %}\n"
        "{% elif message['role'] == 'assistant' %}\n### Response:\n{{ message['content']|trim -}}\n"
        "{% if not loop.last %}\n\n\n{% endif %}\n{% elif message['role'] == 'user_context' %}\n### Input:\n"
        "{{ message['content']|trim -}}\n{% if not loop.last %}\n\n\n{% endif %}\n{% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}\n### Response:\n{% endif %}",
    ],
    "vicuna": [
        SPLIT_SYSTEM.replace(
            "DEFAULT",
            "'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user\\'s questions.'",
        )
        + "{{ bos_token + system_message }}{% for message in loop_messages %}"
        "{% if message['role'] == 'user' %}{{ ' ' if loop.first else '' }}{{ 'USER: ' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        "{%- for message in messages %}{%- if message['role'] == 'system' -%}{{- message['content'] + '\n\n' -}}"
        "{%- elif message['role'] == 'user' -%}{{-'USER: ' + message['content'] + '\n'-}}{%- else -%}"
        "{{-'ASSISTANT: ' + message['content'] + '</s>\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{-'ASSISTANT:'-}}{%- endif -%}",
    ],
    "mistral-v1": [
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n\n{{- bos_token }}\n{%- for message in loop_messages %}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('After the optional system message, conversation roles must alternate') }}\n"
        "    {%- endif %}\n    {%- if message['role'] == 'user' %}\n"
        "        {%- if loop.first and system_message is defined %}\n"
        "            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n"
        "        {%- else %}\n            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n"
        "    {%- elif message['role'] == 'assistant' %}\n        {{- ' ' + message['content'] + eos_token}}\n"
        "    {%- else %}\n        {{- raise_exception('Only user and assistant roles are supported') }}\n"
        "    {%- endif %}\n{%- endfor %}\n",
        # The first published ones take no system message.
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        # And have no space before an answer.
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ],
}

# With control tokens, and the tools of Mixtral 8x22B and Mistral 7B v0.3 left in place.
WITH_CONTROL_TOKENS = (
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n"
    "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n"
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    '{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}\n\n'
    "{%- set ns = namespace() %}\n{%- set ns.index = 0 %}\n{%- for message in loop_messages %}\n"
    '    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and '
    "message.tool_calls is not none)) %}\n"
    '        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}\n'
    '            {{- raise_exception("After the optional system message, conversation roles must alternate") }}\n'
    "        {%- endif %}\n        {%- set ns.index = ns.index + 1 %}\n    {%- endif %}\n{%- endfor %}\n\n"
    "{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n"
    "        {%- if tools is not none and (message == user_messages[-1]) %}\n"
    '            {{- "[AVAILABLE_TOOLS] [" }}\n            {%- for tool in tools %}\n'
    "                {{- tool | tojson }}\n            {%- endfor %}\n"
    '            {{- "[/AVAILABLE_TOOLS]" }}\n            {%- endif %}\n'
    "        {%- if loop.last and system_message is defined %}\n"
    '            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}\n        {%- else %}\n'
    '            {{- "[INST] " + message["content"] + "[/INST]" }}\n        {%- endif %}\n'
    "    {%- elif message.tool_calls is defined and message.tool_calls is not none %}\n"
    '        {{- "[TOOL_CALLS] [" }}\n'
    '    {%- elif message["role"] == "assistant" %}\n        {{- " " + message["content"]|trim + eos_token}}\n'
    "    {%- else %}\n"
    '        {{- raise_exception("Only user and assistant roles are supported") }}\n    {%- endif %}\n{%- endfor %}\n'
)

WORDS = [
    "Hello", " there", "  two spaces", "\n", "\n\n", "tab\t", "é", "日本", "👩‍👧", "\u00a0", "\u2003wide ", "{{ x }}",
    "{% if %}", "[INST]", "</s>", "<|im_end|>", "<s>", "### Response:", "it's", "\\n", "<<SYS>>", "▁",
]  # fmt: skip


def conversation(rng: random.Random, system: bool | None = None) -> list[dict[str, str]]:
    """One to four turns; a system message half of the time."""

    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 5)))

    with_system = rng.random() < 0.5 if system is None else system
    messages = [{"role": "system", "content": text()}] if with_system else []
    for _ in range(rng.randint(0, 3)):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return [*messages, {"role": "user", "content": text()}]
