"""Making good what a cut did to the outputs; no label is read but by ``finetuning``.

- ``batchnorm``: recalibrated statistics;
- ``compensation``: every layer refitted to the dense one (``refits``, ``least_squares``), along
  the branches of the network (``branches``, ``targets``), by chunks of inputs (``chunks``,
  ``walk``, ``refit_run``);
- ``reconstruction``: whole blocks (``blocks``) by damped Gauss-Newton (``gauss_newton``,
  ``preconditioner``);
- ``distillation``, ``finetuning``: training (``training``) towards the dense model, or on labels;
- ``guard``: whether a repair holds on images that it was not fitted to.
"""
