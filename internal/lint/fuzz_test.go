package lint

import (
	"go/ast"
	"strings"
)

// fuzzTarget returns the name of the fuzz target that d declares, or "".
func fuzzTarget(d ast.Decl) string {
	f, ok := d.(*ast.FuncDecl)
	if !ok || f.Recv != nil || !strings.HasPrefix(f.Name.Name, "Fuzz") {
		return ""
	}
	if f.Type.Params.NumFields() != 1 {
		return ""
	}
	star, ok := f.Type.Params.List[0].Type.(*ast.StarExpr)
	if !ok {
		return ""
	}
	sel, ok := star.X.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != "F" {
		return ""
	}
	return f.Name.Name
}
