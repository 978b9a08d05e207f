"""Where the update runs: who owns which parameter, and which saved state fits where."""

from hvd_ext.servers.checkpoint import OwnedState, check_loadable
from hvd_ext.servers.ownership import assign, orthogonalising_cost, owners, shares
from hvd_ext.servers.pieces import Message, Piece, by_owner, cut_evenly, held
from hvd_ext.servers.settings import Server, settings_of

__all__ = ["Message", "OwnedState", "Piece", "Server", "assign", "by_owner", "check_loadable", "cut_evenly",
           "held", "orthogonalising_cost", "owners", "settings_of", "shares"]
