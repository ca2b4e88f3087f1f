"""Chat in the terminal and the browser, pairwise comparison by people, and OpenAI's API for checkpoints."""
