"""Trains the demo model: synthetic music, targets, network, losses, training, evaluation. No part of the packages."""
