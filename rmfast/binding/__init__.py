"""A transformers model as body, final norm and head: found, run without a trace, and what is known of its parts."""
