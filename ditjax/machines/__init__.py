"""Hardware that is not here: topologies, HLO, roofline, plan, cost."""
