"""How much every channel matters to the outputs.

- ``tpv``: the score of this project, E||J_g(x) w_g||^2 of every channel group;
- ``curves``: the same jointly, for every width of a group (``cuts``; of wide ones
  ``second_moments``, ``leaving``);
- ``residuals``: what the other inputs of a layer can stand in for;
- ``taps``, ``sample_gradients``: the passes that all of them are read from;
- ``baselines``: magnitude, Taylor, Jacobian and others; ``criteria`` lists all by name, and
  ``criterion_names`` says which read labels;
- ``importance``: the scores as an importance of torch-pruning.
"""
