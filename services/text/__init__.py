"""What a model directory says about text; shared by services that read one."""
