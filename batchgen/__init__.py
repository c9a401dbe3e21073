"""A table of prompts in, a table of completions out, with a target model and its EAGLE-3 draft head.

`batchgen.job` is the table of contents; `batchgen.worker` is where a row passes.
"""

__version__ = "0.1.0"
