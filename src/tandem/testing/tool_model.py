"""A model directory with a chat template for tools: links to the files of another model, plus its own template.

The demo model was not trained on tools and writes no calls; tests check the prompt.
"""

from __future__ import annotations

from pathlib import Path

TEMPLATE = """\
{%- if tools %}<|system|>
{%- if messages[0].role == "system" %}{{ messages[0].content + "\\n\\n" }}{% endif %}
You may call these functions:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Write each call as <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|end|>
{%- endif %}
{%- for message in messages %}
{%- if message.role == "system" and tools %}{% continue %}{% endif %}
{%- if message.role == "tool" %}<|user|><tool_response>
{{ message.content }}
</tool_response><|end|>
{%- else %}<|{{ message.role }}|>
{%- if message.reasoning_content is defined and message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}
{%- endif %}
"""


def link_tool_model(directory: Path, model: Path) -> Path:
    """Create the model directory and return its path.

    Args:
        directory: created if missing.
        model: directory whose files are linked, except for the chat template.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in model.resolve().iterdir():
        if file.name != "chat_template.jinja":
            (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory
