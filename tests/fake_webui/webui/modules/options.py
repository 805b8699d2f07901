class OptionInfo:
    def __init__(self, default=None, label=""):
        self.default = default
        self.label = label


class Options:
    def __init__(self, data_labels, restricted_opts):
        self.__dict__["data_labels"] = data_labels
        self.__dict__["data"] = {key: info.default for key, info in data_labels.items()}
        self.__dict__["restricted_opts"] = restricted_opts

    def __setattr__(self, key, value):
        assert key in self.data_labels, key
        self.data[key] = value

    def __getattr__(self, item):
        try:
            return self.__dict__["data"][item]
        except KeyError:
            raise AttributeError(item) from None

    def set(self, key, value, is_api=False, run_callbacks=True):
        if self.data.get(key) == value:
            return False
        setattr(self, key, value)
        return True

    def get_default(self, key):
        return self.data_labels[key].default
