"""A model as parts that fit in memory: prelude, decoder blocks one by one, tail. See README.md."""
