"""Writes chat.json: conversations, and what `transformers` makes of them with five chat templates.

  python tests/golden/make_chat.py            writes tests/golden/chat.json
  python tests/golden/make_chat.py --check    computes it again and compares

The templates do what those of SmolLM2, Gemma and Llama 3 do, and all that a template may ask of
its surroundings. The vocabulary is of bytes. Needs transformers and jinja2 (made with 5.24.0 and
3.1.6); nothing of latent_delib is imported.
"""

import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

CONTROL = [
    *("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start|>", "<|header|>", "<|end|>"),
]
# A turn between two tokens, and a system message where there is none. BOS is the first of them.
CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
{{ bos_token + 'system\\nYou help.<|im_end|>\\n' }}
{%- endif -%}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# No system message, turns that alternate, another name for the assistant.
TURNS = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {{- raise_exception('no system message, please') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' ~ role ~ '\\n' ~ message.content | trim ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
# A header before each message; the system message apart from the others, with a date.
HEADERS = """\
{{- bos_token }}
{%- set system = 'none' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set day = strftime_now('%d') | length if strftime_now is defined else 0 %}
{{- '<|start|>system<|header|>' + '\\n\\n' + day | string + ': ' + system + '<|end|>' }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|header|>' + '\\n\\n' + message['content'] | trim }}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|header|>' + '\\n\\n' }}
{%- endif %}
"""
# Blanks before blocks and line ends after them go; loops break; JSON stays as it is.
BLOCKS = """\
{% for message in messages %}
    {% if loop.index > 4 %}
        {% break %}
    {% endif %}
    {% if not message.content %}
        {% continue %}
    {% endif %}
  {{ message | tojson }}
{{ message.content | tojson(indent=2) }}{{ unknown }}
    {% endfor %}
{{ eos_token }}
"""
# Tools, which are absent; marks around the replies; JSON in another form.
REPLIES = """\
{%- if tools is not none or documents is not none %}
{{- 'Tools: ' ~ tools }}
{%- endif %}
{%- for message in messages %}
{{- message.role ~ ': ' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content ~ eos_token }}
{%- endgeneration %}
{%- else %}
{{- message | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
{%- endif %}
{%- endfor %}
"""
TEMPLATES = {
    "chatml": (CHATML, "<|im_start|>", "<|im_end|>"),
    "turns": (TURNS, "<bos>", "<eos>"),
    "headers": (HEADERS, "<bos>", "<|end|>"),
    "blocks": (BLOCKS, "<bos>", "<eos>"),
    "replies": (REPLIES, "<bos>", "<eos>"),
}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION = message("user", "  What is 2 + 2?\n")
HISTORY = [QUESTION, message("assistant", "4 \u2014 \u201cfour\u201d, \u56db\n\n"), QUESTION]
CONVERSATIONS = [
    [QUESTION],
    HISTORY,
    [message("system", "Be brief. <b>&'\"{{ x }}</b> "), *HISTORY],
    [message("user", "")],
    [message("system", "\U0001f600"), message("user", "{% if %}"), message("assistant", "a")],
]


def vocabulary() -> tokenizers.Tokenizer:
    """Returns a tokenizer of single bytes and control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: i for i, piece in enumerate([*CONTROL, *letters])}
    model = tokenizers.Tokenizer(models.BPE(ids, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(CONTROL)
    return model


def case(name: str, messages: list[dict[str, str]]) -> dict:
    """Returns the tokens of a conversation, or the words with which the template refuses it."""
    template, bos, eos = TEMPLATES[name]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary(), bos_token=bos, eos_token=eos, chat_template=template
    )
    found = {"template": name, "messages": messages}
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:
        return found | {"refused": str(error)}
    return found | {"ids": ids}


def main() -> None:
    """Writes the values, or compares them with what is written."""
    found = {
        "vocabulary": json.loads(vocabulary().to_str()),
        "templates": TEMPLATES,
        "cases": [case(name, messages) for name in TEMPLATES for messages in CONVERSATIONS],
    }
    text = json.dumps(found) + "\n"
    path = Path(__file__).with_name("chat.json")
    if "--check" in sys.argv:
        assert path.read_text() == text
        print(f"{path.name} agrees")
    else:
        path.write_text(text)


if __name__ == "__main__":
    main()
