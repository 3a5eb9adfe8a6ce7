"""What hypothesis draws of the choices of a solver."""

from hypothesis import strategies as st

from quantlib.solver_settings import COLUMN_ORDERS, SCALE_SEARCHES, SolverSettings

solvers = st.builds(
    SolverSettings,
    scale_search=st.sampled_from(SCALE_SEARCHES),
    column_order=st.sampled_from(COLUMN_ORDERS),
    descent_passes=st.integers(0, 2),
    refits_scales=st.booleans(),
)
