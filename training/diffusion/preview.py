class Previewer: pass
