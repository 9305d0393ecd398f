"""Text in, token sequences out: corpora, tasks, prompts, and the generated grammar."""
