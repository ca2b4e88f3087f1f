"""Data sets that local models write: instructions, answers, and preferences by a judge."""
