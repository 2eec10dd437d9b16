"""Decoders of other projects, rebuilt from their publications, to compare ours with."""

from script.benchmarks.peers.csvit import CsVitNet
from script.benchmarks.peers.hamer import HamerNet

PEERS = {"hamer": HamerNet, "csvit": CsVitNet}
