"""Small chat templates with the traits of those that models ship, and the answers that each has in one conversation.

Each was written for this test. `CONVERSATION` has a system message, two questions and two answers, the first of which
has reasoning. `answers` are the texts that must carry loss: by `auto`, in the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 91 prime?"},
    {"role": "assistant", "content": "No: 7 x 13.", "reasoning_content": "91 = 7 * 13"},
    {"role": "user", "content": "And 97 🎉?"},
    {"role": "assistant", "content": "Yes. 👩‍👩‍👧", "reasoning_content": "no divisor"},
]
FIRST, SECOND = "No: 7 x 13.", "Yes. 👩‍👩‍👧"


@dataclass(frozen=True, kw_only=True)
class TemplateKind:
    """A template, the tokens at which generation stops, and its answers: one list per row."""

    text: str
    stops: tuple[str, ...]
    answers: list[list[str]]
    system: bool = True
    reasoning: bool = False
    rewrites: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _chatml(assistant: str, prompt: str = "<|im_start|>assistant\\n", before: str = "") -> str:
    return (
        before + "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' -}}"
        "{%- if m.role == 'assistant' -%}" + assistant + "{%- else -%}{{- m.content -}}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '" + prompt + "' -}}{%- endif -%}"
    )


_LAST_QUESTION = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
_END = ("<|im_end|>",)
_BOTH = [[FIRST + "<|im_end|>", SECOND + "<|im_end|>"]]
_THOUGHT = [
    "<think>\n91 = 7 * 13\n</think>\n\n" + FIRST + "<|im_end|>",
    "<think>\nno divisor\n</think>\n\n" + SECOND + "<|im_end|>",
]

KINDS: dict[str, TemplateKind] = {
    "chatml, generic in the role": TemplateKind(
        text="{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
        stops=_END,
        answers=_BOTH,
    ),
    "chatml with a system message of its own": TemplateKind(
        text=_chatml(
            "{{- m.content -}}",
            before="{%- if messages[0].role != 'system' -%}"
            "{{- '<|im_start|>system\\nHelp.<|im_end|>\\n' -}}{%- endif -%}",
        ),
        stops=_END,
        answers=_BOTH,
    ),
    "chatml with reasoning in every turn": TemplateKind(
        text=_chatml(
            "{%- if m.reasoning_content -%}{{- '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' -}}"
            "{%- endif -%}{{- m.content -}}"
        ),
        stops=_END,
        answers=[_THOUGHT],
        reasoning=True,
    ),
    "history loses its thinking": TemplateKind(
        text=_chatml(
            "{%- if loop.index0 > ns.last and m.reasoning_content -%}"
            "{{- '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' -}}{%- endif -%}{{- m.content -}}",
            before=_LAST_QUESTION,
        ),
        stops=_END,
        answers=[[_THOUGHT[0]], [_THOUGHT[1]]],
        reasoning=True,
        rewrites=True,
    ),
    "the prompt opens the thinking": TemplateKind(
        text=_chatml(
            "{{- '<think>\\n' ~ m.reasoning_content | default('') ~ '\\n</think>\\n\\n' ~ m.content -}}",
            prompt="<|im_start|>assistant\\n<think>\\n",
        ),
        stops=_END,
        answers=[[text.removeprefix("<think>\n") for text in _THOUGHT]],
        reasoning=True,
    ),
    "the prompt opens thinking that the text lacks": TemplateKind(
        text=_chatml("{{- m.content -}}", prompt="<|im_start|>assistant\\n<think>\\n"),
        stops=_END,
        answers=_BOTH,
    ),
    "the prompt holds an empty thought where thinking is off": TemplateKind(
        text=_chatml(
            "{{- '<think>\\n\\n</think>\\n\\n' ~ m.content -}}",
            prompt="<|im_start|>assistant\\n' ~ ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false"
            " else '') ~ '",
        ),
        stops=_END,
        answers=_BOTH,
        variables={"enable_thinking": False},
    ),
    "the last answer alone gets an empty thought": TemplateKind(
        text=_chatml(
            "{%- if loop.index0 > ns.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{{- m.content -}}",
            before=_LAST_QUESTION,
        ),
        stops=_END,
        answers=[["<think>\n\n</think>\n\n" + text + "<|im_end|>"] for text in (FIRST, SECOND)],
        rewrites=True,
    ),
    "headers, trimmed contents, two kinds of stop": TemplateKind(
        text="{{- bos_token -}}{%- for m in messages -%}"
        "{{- '<|header|>' ~ m.role ~ '<|/header|>\\n\\n' ~ m.content | trim ~ '<|eot|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|header|>assistant<|/header|>\\n\\n' -}}{%- endif -%}",
        stops=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
        answers=[[FIRST + "<|eot|>", SECOND + "<|eot|>"]],
    ),
    "headers with today's date": TemplateKind(
        text="{{- '<|header|>system<|/header|>\\n\\nToday: ' ~ strftime_now('%d %b %Y') ~ '<|eot|>' -}}"
        "{%- for m in messages -%}{{- '<|header|>' ~ m.role ~ '<|/header|>\\n\\n' ~ m.content ~ '<|eot|>' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|header|>assistant<|/header|>\\n\\n' -}}{%- endif -%}",
        stops=("<|eot|>",),
        answers=[[FIRST + "<|eot|>", SECOND + "<|eot|>"]],
    ),
    "instructions in brackets, no generation prompt": TemplateKind(
        text="{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<s>[INST] ' ~ m.content ~ ' [/INST]' -}}"
        "{%- elif m.role == 'assistant' -%}{{- ' ' ~ m.content ~ ' </s>' -}}{%- endif -%}{%- endfor -%}",
        stops=("</s>",),
        answers=[[" " + FIRST + " </s>", " " + SECOND + " </s>"]],
        system=False,
    ),
    "the system message goes to the last question": TemplateKind(
        text="{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}{{- '<s>' -}}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '[INST] ' ~ (system ~ '\\n' if loop.last) ~ m.content"
        " ~ '[/INST]' -}}{%- elif m.role == 'assistant' -%}{{- '<|answer|>' ~ m.content ~ '</s>' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|answer|>' -}}{%- endif -%}",
        stops=("</s>",),
        answers=[[FIRST + "</s>"], [SECOND + "</s>"]],
        system=False,
        rewrites=False,
        notes=("answers put behind the prompt as it was served", "text not learned or not rendered: system's content"),
    ),
    "another name for the assistant, no system role": TemplateKind(
        text="{{- '<bos>' -}}{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}"
        "{%- endif -%}"
        "{%- for m in messages -%}{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n'"
        " ~ m.content ~ '<end_of_turn>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
        stops=("<eos>", "<end_of_turn>"),
        answers=[[FIRST + "<end_of_turn>", SECOND + "<end_of_turn>"]],
        system=False,
    ),
    "a turn ends with a token that is no stop": TemplateKind(
        text="{%- for m in messages -%}{{- '<start_of_turn>' ~ m.role ~ '\\n' ~ m.content ~ '<end_of_turn>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>assistant\\n' -}}{%- endif -%}",
        stops=("<eos>",),
        answers=[[FIRST + "<end_of_turn>", SECOND + "<end_of_turn>"]],
        notes=("answers that end without a token that stops generation",),
    ),
    "the next role's token stops": TemplateKind(
        text="{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\\n' ~ m.content -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}",
        stops=("<|user|>", "<|endoftext|>"),
        answers=[[FIRST + "<|user|>", SECOND]],
        notes=("answers that end without a token that stops generation",),
    ),
    "wide bars, thinking cut off by a split": TemplateKind(
        text="{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<｜User｜>' ~ m.content -}}"
        "{%- elif m.role == 'assistant' -%}{{- '<｜Assistant｜>' ~ (m.content.split('</think>') | last) -}}"
        "{{- '<｜eos｜>' -}}"
        "{%- else -%}{{- m.content -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}",
        stops=("<｜eos｜>",),
        answers=[[FIRST + "<｜eos｜>", SECOND + "<｜eos｜>"]],
    ),
    "channels, and another end in history": TemplateKind(
        text="{{- '<|start|>system<|message|>Date: ' ~ strftime_now('%Y-%m-%d') ~ '<|end|>' -}}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{%- if loop.last and m.thinking -%}{{- '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking"
        " ~ '<|end|>' -}}{%- endif -%}{{- '<|start|>assistant<|channel|>final<|message|>' ~ m.content"
        " ~ ('<|return|>' if loop.last else '<|end|>') -}}{%- else -%}"
        "{{- '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}",
        stops=("<|return|>", "<|call|>"),
        answers=[
            [
                "<|channel|>analysis<|message|>91 = 7 * 13<|end|><|start|>assistant<|channel|>final<|message|>"
                + FIRST
                + "<|return|>"
            ],
            [
                "<|channel|>analysis<|message|>no divisor<|end|><|start|>assistant<|channel|>final<|message|>"
                + SECOND
                + "<|return|>"
            ],
        ],
        reasoning=True,
        rewrites=True,
    ),
    "names of roles as tokens": TemplateKind(
        text="{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}",
        stops=("<|endoftext|>", "<|end|>"),
        answers=[[FIRST + "<|end|>", SECOND + "<|end|>"]],
        variables={"eos_token": "<|endoftext|>"},
    ),
    "roles between tokens": TemplateKind(
        text="{%- for m in messages -%}{{- '<|role|>' ~ m.role ~ '<|/role|>' ~ m.content ~ '<|eos|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|role|>assistant<|/role|>' -}}{%- endif -%}",
        stops=("<|eos|>",),
        answers=[[FIRST + "<|eos|>", SECOND + "<|eos|>"]],
    ),
    "plain words, no tokens but the end": TemplateKind(
        text="{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content ~ ' ' -}}"
        "{%- elif m.role == 'user' -%}{{- 'USER: ' ~ m.content ~ ' ' -}}{%- else -%}"
        "{{- 'ASSISTANT: ' ~ m.content ~ '</s>' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}",
        stops=("</s>",),
        answers=[[" " + FIRST + "</s>", " " + SECOND + "</s>"]],
    ),
    "headings": TemplateKind(
        text="{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '### Instruction:\\n' ~ m.content ~ '\\n\\n' -}}"
        "{%- elif m.role == 'assistant' -%}{{- '### Response:\\n' ~ m.content ~ '<|eot|>\\n\\n' -}}{%- else -%}"
        "{{- m.content ~ '\\n\\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}",
        stops=("<|eot|>",),
        answers=[[FIRST + "<|eot|>", SECOND + "<|eot|>"]],
    ),
    "contents as parts or text": TemplateKind(
        text=_chatml(
            "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for part in m.content -%}{{- part.text -}}"
            "{%- endfor -%}{%- endif -%}"
        ),
        stops=_END,
        answers=_BOTH,
    ),
    "tags around too much": TemplateKind(
        text=_chatml("{%- generation -%}{{- m.content -}}{%- endgeneration -%}").replace(
            "{{- '<|im_end|>\\n' -}}", "{%- generation -%}{{- '<|im_end|>\\n' -}}{%- endgeneration -%}"
        ),
        stops=_END,
        answers=_BOTH,
        notes=(
            "generation tags leave out at an answer's begin: " + repr(FIRST),
            "generation tags add behind an answer: '\\n'",
            "generation tags leave out at an answer's begin: " + repr(SECOND),
        ),
    ),
    "tags around exactly the answer": TemplateKind(
        text=_chatml("{%- generation -%}{{- m.content ~ '<|im_end|>' -}}{%- endgeneration -%}").replace(
            "{{- '<|im_end|>\\n' -}}", "{{- '\\n' if m.role == 'assistant' else '<|im_end|>\\n' -}}"
        ),
        stops=_END,
        answers=_BOTH,
    ),
}
