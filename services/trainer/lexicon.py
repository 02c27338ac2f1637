"""English and Chinese words of the translation exercises.

Invariants: every noun has the measure word that Chinese puts between a number and it; words are unambiguous in both
directions inside this lexicon, so that each phrase has exactly one right translation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noun:
    english: str
    plural: str
    chinese: str
    measure: str


NOUNS = (
    Noun("cat", "cats", "猫", "只"),
    Noun("dog", "dogs", "狗", "只"),
    Noun("bird", "birds", "鸟", "只"),
    Noun("book", "books", "书", "本"),
    Noun("apple", "apples", "苹果", "个"),
    Noun("car", "cars", "汽车", "辆"),
    Noun("house", "houses", "房子", "座"),
    Noun("chair", "chairs", "椅子", "把"),
    Noun("table", "tables", "桌子", "张"),
    Noun("flower", "flowers", "花", "朵"),
    Noun("tree", "trees", "树", "棵"),
    Noun("fish", "fish", "鱼", "条"),
    Noun("cup", "cups", "杯子", "个"),
    Noun("hat", "hats", "帽子", "顶"),
    Noun("phone", "phones", "手机", "部"),
    Noun("boat", "boats", "船", "艘"),
    Noun("horse", "horses", "马", "匹"),
    Noun("bag", "bags", "包", "个"),
    Noun("pen", "pens", "笔", "支"),
    Noun("door", "doors", "门", "扇"),
)
ADJECTIVES = (
    ("big", "大"),
    ("small", "小"),
    ("red", "红色的"),
    ("white", "白色的"),
    ("black", "黑色的"),
    ("new", "新"),
    ("old", "旧"),
    ("beautiful", "漂亮的"),
    ("cheap", "便宜的"),
    ("green", "绿色的"),
    ("blue", "蓝色的"),
    ("expensive", "昂贵的"),
)
# Only these stand alone after "很"; colours would need another sentence pattern.
PREDICATES = (
    ("big", "大"),
    ("small", "小"),
    ("new", "新"),
    ("beautiful", "漂亮"),
    ("cheap", "便宜"),
    ("expensive", "贵"),
)
SUBJECTS = (("I", "我"), ("You", "你"), ("We", "我们"), ("They", "他们"), ("He", "他"), ("She", "她"))
THIRD_PERSON = ("He", "She")
VERBS = (
    ("like", "likes", "喜欢"),
    ("want", "wants", "想要"),
    ("see", "sees", "看见"),
    ("have", "has", "有"),
    ("buy", "buys", "买"),
    ("need", "needs", "需要"),
    ("sell", "sells", "卖"),
)
ACTIONS = (
    ("work", "works", "工作"),
    ("sleep", "sleeps", "睡觉"),
    ("eat", "eats", "吃饭"),
    ("read", "reads", "看书"),
    ("sing", "sings", "唱歌"),
    ("wait", "waits", "等"),
    ("run", "runs", "跑步"),
)
PLACES = (
    ("at home", "在家"),
    ("at school", "在学校"),
    ("in the park", "在公园里"),
    ("in the garden", "在花园里"),
    ("at the station", "在车站"),
    ("in the city", "在城市里"),
)
TIMES = (("today", "今天"), ("every day", "每天"), ("now", "现在"))
NUMBERS = (
    ("two", "两"),
    ("three", "三"),
    ("four", "四"),
    ("five", "五"),
    ("six", "六"),
    ("seven", "七"),
    ("eight", "八"),
    ("nine", "九"),
    ("ten", "十"),
)
FIXED = (
    ("Good morning.", "早上好。"),
    ("Good night.", "晚安。"),
    ("Thank you.", "谢谢。"),
    ("Goodbye.", "再见。"),
    ("Hello.", "你好。"),
    ("I love you.", "我爱你。"),
    ("I do not know.", "我不知道。"),
    ("Happy birthday.", "生日快乐。"),
    ("How are you?", "你好吗？"),
    ("What is your name?", "你叫什么名字？"),
)
