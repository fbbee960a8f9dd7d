"""What scripts/roofline is made of: speeds of the machine, work of the graphs, and where their time goes."""
