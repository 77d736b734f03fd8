"""A chat in twenty lines: the conversation is a list, the reply streams.

python examples/chat.py                     the demo model
python examples/chat.py ./qwen "You are a pirate."
"""

import sys

from numbainfer import LLM, SamplingParams

model, system = [*sys.argv[1:], None, None][:2]
messages = [{"role": "system", "content": system}] if system else []

with LLM(model, batch_size=1) as llm:
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:  # Ctrl-D
            break
        # Only what is new is computed: the KV cache still has the turns before.
        with llm.stream(messages, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=200)) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": stream.generation.text})
