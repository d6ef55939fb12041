"""Before renting: does a stage fit a slice, how fast can it be, and what would limit it?

`forecast.make` compiles the real step (the function and shardings of `training/trainer.py`) for
chips that need not be there, and adds what the compiler does not say: `targets` slices, `inputs`
shapes of a batch, `hlo` the compiled text, `memory`, `collectives`, `roofline`, `records` a look
at the data, `report` the page.
"""
