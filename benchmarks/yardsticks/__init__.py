"""Two other ways to compute what the model computes, to measure ours against: the published one and a simple fast one.

Both take the weights of one of our models in its mask-token form and give the same numbers.
"""
