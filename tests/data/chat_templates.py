"""Chat templates in the shape of the published ones: what they write, in words of our own.

Each has a habit that has hidden turns or moved text in other training code.
"""

# ruff: noqa: E501 - templates read better in lines that are as long as their parts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Llama 3.2: a system turn that holds the date, calls as bare JSON, a role for tools of its own.
LLAMA32 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "{% if tools is not none %}Environment: ipython\n{% endif %}"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if tools is not none %}You may call these functions:\n\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{{ system }}<|eot_id|>"
    "{% for m in messages %}"
    "{% if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m['role'] == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m['content'] | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# Qwen3: reasoning only behind the last question, an empty one there if there is none; answers of tools as the user's turn.
QWEN3 = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}# Tools\n<tools>"
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last_question=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set reasoning = '' %}"
    "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last_question and (loop.last or reasoning) %}"
    "<think>\n{{ reasoning.strip('\n') }}\n</think>\n\n{% endif %}{{ content.lstrip('\n') }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if not loop.first or content }}"
    "{% set call = call.function or call %}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": '
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}}\n</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Phi-3: EOS behind the conversation, but not in front of the generation prompt.
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

# Gemma 3: the assistant is called model, and the system text begins the first question; turns must alternate.
GEMMA3 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set prefix = '' %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ prefix if loop.first }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Mistral v0.3: the system text and the tools stand in the last question, wherever that is; no generation prompt.
MISTRAL3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% set ns = namespace(index=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' or (m['role'] == 'assistant' and not m.tool_calls) %}"
    "{% if (m['role'] == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{% if tools is not none and m == questions[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% if loop.last and system is defined %}[INST] {{ system + '\n\n' + m['content'] }}[/INST]"
    "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS] {{ m['content'] | tojson }}[/TOOL_RESULTS]"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)

# DeepSeek R1: reasoning is cut from every answer, but the generation prompt opens one; arguments are text.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% set ns = namespace(is_tool=false) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% set ns.is_tool = false %}"
    "{% elif m['role'] == 'assistant' and m['tool_calls'] %}<|Assistant|><|calls|>"
    "{% for call in m['tool_calls'] %}"
    "{{ call['function']['name'] + '\n```json\n' + call['function']['arguments'] + '\n```' }}{% endfor %}"
    "{{ '<|/calls|>' + eos_token }}{% set ns.is_tool = false %}"
    "{% elif m['role'] == 'tool' %}<|output|>{{ m['content'] }}<|/output|>{% set ns.is_tool = true %}"
    "{% elif m['role'] == 'assistant' %}{{ '' if ns.is_tool else '<|Assistant|>' }}"
    "{{ m['content'].split('</think>')[-1] + eos_token }}{% set ns.is_tool = false %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.is_tool %}<|Assistant|><think>\n{% endif %}"
)

# SmolLM3, TRL's variants and others mark what the assistant writes.
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# name: (template, its special tokens, its EOS)
TEMPLATES = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Llama 3.2": (LLAMA32, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "Qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Phi-3": (PHI3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], "<|endoftext|>"),
    "Gemma 3": (GEMMA3, ["<start_of_turn>", "<end_of_turn>"], "</s>"),
    "Mistral v0.3": (
        MISTRAL3,
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"],
        "</s>",
    ),
    "DeepSeek": (
        DEEPSEEK, ["<|User|>", "<|Assistant|>", "<|calls|>", "<|/calls|>", "<|output|>", "<|/output|>"], "</s>"
    ),
    "marked": (MARKED, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}  # fmt: skip


def use_template(tokenizer, name: str) -> None:
    """Give the tokenizer the template and special tokens of this name."""
    template, special_tokens, eos_token = TEMPLATES[name]
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": eos_token})
    tokenizer.chat_template = template
