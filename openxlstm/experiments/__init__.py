"""The papers' experiments, at sizes from a minute on a laptop to the published setting, with baselines by one loop.

plans.py         every experiment in its profiles, as data: tasks, models, budgets, rates, seeds, what is published
contestants.py   the models that compete, by name, all of one size
solve.py         train a model on a synthetic task, and test it
language.py      train language models by the trainer, and test them on documents
generation.py    time and memory of a token, over the length of what was generated
grid.py          every run of a plan, in parallel, one line each; goes on where it was interrupted
results.py       those lines: written once, never edited
numbers.py       intervals of rates, of means over seeds, of paired differences
report.py        docs/reproduction.md from the lines: tables, verdicts by rule, pictures
"""
