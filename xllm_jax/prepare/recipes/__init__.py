"""How the paper built its data: one file a construction, each with `build(input, output, …)`.

    translated.py     the texts of any source in Chinese
    questions.py      the texts that need a translation, without doubles
    vsdial_cn.py      VSDial-CN: VisDial in Chinese, its questions spoken
    similar.py        image-text pairs that CLIP finds alike
    instructions.py   the instruction set of stage 3, drawn from its sources
    resampled.py      audio at 16 kHz, in the folders it came in

`launch/build_data.py` runs them. Each works through `runner.mapped`, continues after an
interruption, and returns its counts.
"""
