"""The wire contract, `lrpilot.v1`: generated from the .proto files beside this one."""
