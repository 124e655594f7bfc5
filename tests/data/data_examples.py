"""Pairs and chat templates that the tests of the data layer share."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3: the template writes the beginning-of-sequence token itself.
LLAMA = (
    "{{ bos_token }}"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Phi-3: the end-of-sequence token follows the end-of-turn token where no generation prompt is asked for.
PHI = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# DeepSeek-R1: the generation prompt opens a thought that finished answers do not have.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
# Mistral 7B Instruct v0.3: the system message stands in the last turn, where that is the user's.
LAST_TURN = (
    "{% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}<s>"
    "{% for message in turns %}{% if message['role'] == 'user' %}<|user|>"
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ message['content'] }}<|assistant|>"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)
# Zephyr without its end token: nothing but text closes a turn.
UNCLOSED = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Gemma and Mistral refuse roles that do not alternate.
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles have to alternate') }}{% endif %}{% endfor %}" + CHATML
)


def plain_pair(number, prompt=None):
    """A valid plain text pair that differs from all others."""
    return {"prompt": prompt or f"prompt {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}


def chat_pair(prompt="What is the capital of France?", chosen="Paris.", rejected="I do not know."):
    """A valid chat pair."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
