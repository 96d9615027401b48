"""``tpvprune benchmark``: criteria at equal budgets: ``plan``, ``running``, ``rows``, ``page``."""
