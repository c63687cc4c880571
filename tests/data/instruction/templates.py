"""Chat templates of the kinds that models come with, and a tokenizer folder to go with them."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]

# A header and an end for each message.
HEADERS = """
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# The system's text within the first question; no prompt for an answer but the end of the question.
FOLDED = """
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('questions and answers must take turns') }}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
  {%- else -%}
    {{ ' ' + message['content'].strip() + ' ' + eos_token }}
  {%- endif -%}
{%- endfor -%}
"""

# Answers marked; written with tags that take the white space around them away, a loop control and a namespace.
MARKED = """
{% set told = namespace(names=[]) %}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% set told.names = told.names + [message.role] %}
{{ '<|im_start|>' ~ message.role }}
    {% if message.role == 'assistant' %}
        {%- generation -%}
{{ message.content }}<|im_end|>
        {%- endgeneration %}
    {% else %}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{{ told.names | tojson }}
"""

# Reasoning is kept in the last answer only, and an empty one is written there where it has none.
FORGETFUL = """
{%- for message in messages -%}
  {%- set content = message.content.split('</think>')[-1] -%}
  {%- set thought = '<think></think>' if message.role == 'assistant' and loop.last else '' -%}
{{ '<|im_start|>' + message.role + '\n' + thought + content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def make_folder(folder: Path, template: str) -> Path:
    """A byte-level BPE with special tokens behind its own, and a chat template in its configuration."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["assistant user system", "what helps against pain ?\n\n", "aspirin helps , rest as well .\n"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder


def make_marking_folder(folder: Path, template: str, scheme: str, strips: bool) -> Path:
    """A BPE with space marks before the first text or all, of which a special token may take the space behind it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace()
    bytes_and_unknown = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=bytes_and_unknown, show_progress=False)
    tokenizer.train_from_iterator(["assistant user what helps against pain ? aspirin helps ."] * 20, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, rstrip=strips) for token in SPECIAL_TOKENS])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    configuration["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder
