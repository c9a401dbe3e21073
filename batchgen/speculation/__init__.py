"""The arithmetic of speculation: what a tree costs, what it is expected to yield, and which one to draft.

A job's throughput is tokens over seconds summed over its steps, so a step maximises `tokens - throughput * seconds`
(Dinkelbach, Management Science 13, 1967): `schedule` says how deep and wide to draft, `calibration` how likely each
drafted token is kept, `budget` which of them all rows together verify, and `costs` what passes take.
"""
