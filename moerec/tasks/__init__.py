"""What is learned: each task's losses over the one stream of slots, and the registries of losses and tasks."""

from moerec.nn.heads.item import Candidates, TargetItems
from moerec.tasks.base import Draws, Task, TaskSums, make_tasks, register_task
from moerec.tasks.item_text import ItemToText, TextToItem
from moerec.tasks.lm import LanguageModel, sum_token_nll
from moerec.tasks.losses import draw_all, draw_one_each, draw_shared, register_loss
from moerec.tasks.next_event import NextEvent, check_loss

__all__ = [
    "Candidates",
    "Draws",
    "ItemToText",
    "LanguageModel",
    "NextEvent",
    "TargetItems",
    "Task",
    "TaskSums",
    "TextToItem",
    "check_loss",
    "draw_all",
    "draw_one_each",
    "draw_shared",
    "make_tasks",
    "register_loss",
    "register_task",
    "sum_token_nll",
]
