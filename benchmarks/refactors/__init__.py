"""Random refactors of tiny networks with known truth: how often is a mapping right, and is it ever silently wrong?

    structures*.py   networks as lists of leaves, in the order in which they run
    forms*.py        what a leaf stores, and in which layout
    network.py       a side of a pair: leaves, names, numbering; the module that it becomes
    operators_*.py   what a refactor does to a side
    vocabulary.py    words for the roles, harvested from real code (harvest*.py) and by hand (words*.json)
    config.py        a pair as plain data: drawn from a seed, replayable, shrinkable
    fairness.py      whether a pair deceives by its names
    pair.py          one pair, built and scored
    report.py        many pairs, summed up

Words, structures and operators are split into ``first``, ``second``, ``third`` and ``fourth`` (look at them as you
like) and ``validate`` (never look at what fails there while rules are being written; only the counts are read). What
belongs to one of the last three alone stands in files called ``*_third``, ``*_fourth`` and ``*_validate``. ``fourth``
was called ``validate`` until its wrong cases were looked at; it draws the same pairs from the same seeds.
"""
