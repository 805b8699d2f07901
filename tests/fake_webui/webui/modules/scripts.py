class ScriptRunner:
    def __init__(self):
        self.scripts = []
        self.alwayson_scripts = []
