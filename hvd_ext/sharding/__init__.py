"""Where the update runs: who owns which parameter, and which saved state fits where."""

from hvd_ext.sharding.checkpoint import OwnedState, check_loadable
from hvd_ext.sharding.ownership import assign_owners, orthogonalising_cost, owned_elements, plan_owners
from hvd_ext.sharding.settings import Server, settings_of
from hvd_ext.sharding.shards import Shard, ShardedBucket, by_owner, cut_evenly, elements_by_rank

__all__ = [
           "OwnedState",
           "Server",
           "Shard",
           "ShardedBucket",
           "assign_owners",
           "by_owner",
           "check_loadable",
           "cut_evenly",
           "elements_by_rank",
           "orthogonalising_cost",
           "owned_elements",
           "plan_owners",
           "settings_of",
]
