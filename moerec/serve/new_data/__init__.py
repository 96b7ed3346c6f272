"""New tables for a trained run: users, events and items that were not there when it was trained."""

from moerec.serve.new_data.extend import extend_run, open_extended
from moerec.serve.new_data.merge import Additions
from moerec.serve.new_data.read import CITY_SCHEMA, find_schema

__all__ = ["CITY_SCHEMA", "Additions", "extend_run", "find_schema", "open_extended"]
