"""The launcher half: observe the hosts, plan, execute, watch, bring the result home.

May import contract, transport, reporting and agent.payload; never numpy, grpc or the cluster half.
`plan` is pure; `execute` decides nothing. The hosts are the truth: nothing is remembered on the
laptop.
"""
